"""Tables and figure of a results file: `python -m bench.report RESULTS.json [--readme FILE]`."""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]
Case = dict[str, Any]

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"
_LARGE, _SMALL, _GPT2 = "one 30 M tensor", "1000 tensors of 256", "GPT-2 small"
_HUGE, _RESNET, _TINY = "one 1 B tensor", "ResNet-50", "10,000 tensors of 16"
_FUSED = ("AdamCM C=5", "AdamCM C=20")
_MIB = 2**20
# Okabe and Ito's blue and vermilion, which the colour-blind can tell apart.
_MEASURED, _PREDICTED = "#0072B2", "#D55E00"


class Target(NamedTuple):
    """A figure the optimizer is held to; `measured` is None where it was left out."""

    name: str
    measured: float | None
    bound: float

    def row(self) -> list[str]:
        """Return the row of the table of targets."""
        bound = f"{self.bound:.3f}"
        if self.measured is None:
            return [self.name, "not measured", bound, "-"]
        met = "met" if self.measured <= self.bound else "NOT MET"
        return [self.name, f"{self.measured:.3f}", bound, met]


def _ratio(results: Results, workload: str, capacity: int) -> float | None:
    wanted = (workload, f"AdamCM C={capacity}", "replacing")
    for case in results["cases"]:
        if (case["workload"], case["provider"], case["regime"]) == wanted:
            return float(case["ratio_to_fused_adamw"]["median"])
    return None


def targets(results: Results) -> list[Target]:
    """Return the acceptance figures of the device that was measured."""
    of_memory = [target for entry in results["memory"] for target in _memory_targets(entry)]
    if results["device"]["type"] != "cpu":
        return [*_gpu_targets(results), *of_memory]
    five, twenty = (_ratio(results, _LARGE, capacity) for capacity in (5, 20))
    apart = None if five is None or twenty is None else abs(twenty / five - 1)
    return [
        Target(f"time ratio, {_LARGE}, C=5, replacing", five, 1.65),
        Target(f"time ratio, {_LARGE}, C=20, replacing", twenty, 1.65),
        Target(f"C=20 against C=5, {_LARGE}, relative difference", apart, 0.05),
        Target(f"time ratio, {_SMALL}, C=5, replacing", _ratio(results, _SMALL, 5), 0.4),
        Target(f"time ratio, {_GPT2}, C=5, replacing", _ratio(results, _GPT2, 5), 1.65),
        *of_memory,
    ]


def _gpu_targets(results: Results) -> list[Target]:
    found = []
    for workload in (_HUGE, _GPT2):
        share = _share_of_copy(results, workload)
        inverse = None if share is None else 1 / share
        found += [
            Target(f"copy's bandwidth over the step's, {workload}, C=5", inverse, 1 / 0.9),
            Target(f"time ratio, {workload}, C=5, replacing", _ratio(results, workload, 5), 1.65),
        ]
    found += [
        Target(f"time ratio, {workload}, C=5", _ratio(results, workload, 5), 1.0)
        for workload in (_RESNET, _TINY)
    ]
    fused = [case for case in results["cases"] if case["provider"] in _FUSED]
    # 0 where the profiler did not see the device.
    launched = [n for c in fused if (n := c["launches"]["kernels"] + c["launches"]["copies"])]
    ratios = [
        errors["ratio"]
        for run in results.get("parity", {"runs": []})["runs"]
        if (errors := run["largest_errors"]["parameters"])["ratio"] is not None
    ]
    return [
        *found,
        Target("launches a step of AdamCM", max(launched, default=None), 2),
        Target(
            "allocations a step of AdamCM", max((c["allocations"] for c in fused), default=None), 0
        ),
        Target("parameters' error over eager float32's", max(ratios, default=None), 2),
    ]


def _share_of_copy(results: Results, workload: str) -> float | None:
    wanted = (workload, "AdamCM C=5", "replacing")
    for case in results["cases"]:
        if (case["workload"], case["provider"], case["regime"]) == wanted:
            return float(case["share_of_copy"])
    return None


def _memory_targets(entry: dict[str, Any]) -> list[Target]:
    capacity = entry["capacity"]
    # Keys, step and pending slot are some bytes a tensor: nothing at this precision.
    state = round(entry["state_bytes_per_element"], 3)
    growth = entry["peak_growth_bytes"] / _MIB
    # One MiB and a hundredth of the parameters.
    allowed = 1 + 0.01 * 4 * entry["elements"] / _MIB
    return [
        Target(f"state, bytes per element, C={capacity}", state, 4 * (capacity + 3)),
        Target(f"peak growth of memory in a step, MiB, C={capacity}", growth, allowed),
    ]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pivot(
    corner: str, cases: list[Case], row: Callable[[Case], str], column: Callable[[Case], str]
) -> str:
    """Return a table of measured (predicted) ratios; rows and columns in order of appearance."""
    cells = {(row(case), column(case)): _cell(case) for case in cases}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    body = [[name, *(cells.get((name, key), "-") for key in columns)] for name in rows]
    return _table([corner, *columns], body)


def _cell(case: Case) -> str:
    measured = f"{case['ratio_to_fused_adamw']['median']:.2f}"
    predicted = case.get("predicted_ratio")
    return measured if predicted is None else f"{measured} ({predicted:.2f})"


def main_table(results: Results) -> str:
    """Return what the README shows: every provider, steady state, and what was measured how."""
    device, versions = results["device"], results["versions"]
    steady = _steady(results)
    rounds = [case["rounds"] for case in steady]
    return "\n\n".join(
        [
            _pivot("workload", steady, lambda c: c["workload"], lambda c: c["provider"]),
            "Time of a step divided by that of `torch.optim.AdamW(fused=True)`: **lower is "
            "better**. Median of the ratios of paired steps, each right after one of the baseline "
            f"in the same process ({min(rounds)} to {max(rounds)} pairs); every step replaces a "
            "slot. In brackets what the byte model predicts, where memory is the limit; "
            "-: left out.",
            f"Measured {results['date']} on {_described(device)}; torch {versions['torch']}, "
            f"Python {versions['python']}, cm_fused {versions['cm_fused']} at "
            f"{versions['commit']}; load average before: {results['load_before']:.2f}.",
        ]
    )


def _described(device: dict[str, Any]) -> str:
    if device["type"] == "cpu":
        return (
            f"{device['model']}, {device['cores']} cores, {device['threads']} threads, "
            f"{device['cache']}, {device['memory_gib']} GiB, {device['instructions']}"
        )
    return (
        f"{device['model']}, compute capability {device['compute_capability']}, "
        f"{device['multiprocessors']} multiprocessors, {device['cache']}, "
        f"{device['memory_gib']} GiB, driver {device['driver']}, {device['backend']}; "
        f"{device['host']}, {device['cores']} cores"
    )


def markdown(results: Results) -> str:
    """Return the whole report."""
    regimes = [case for case in results["cases"] if case["regime"] != "no buffer"]
    several = [c for c in regimes if c["provider"] in _measured_in_regimes(regimes)]
    left_out = [
        f"- {entry['workload']}, {entry['provider']}: {entry['reason']}"
        for entry in results["left_out"]
    ]
    return "\n\n".join(
        [
            main_table(results),
            "By regime:",
            _pivot(
                "workload, provider",
                several,
                lambda c: f"{c['workload']}, {c['provider']}",
                lambda c: c["regime"],
            ),
            f"Absolute (a copy moves {results['copy_gb_per_s']:.1f} GB/s):",
            _table(
                ["case", "ms", "AdamW ms", "quartiles of the ratio", "GB/s", "share of a copy"],
                map(_absolute_row, results["cases"]),
            ),
            *_only_on_cuda(results),
            "Left out:",
            "\n".join(left_out) or "nothing",
            "Targets:",
            _table(["target", "measured", "bound", "result"], [t.row() for t in targets(results)]),
        ]
    )


def _measured_in_regimes(cases: list[Case]) -> set[str]:
    return {case["provider"] for case in cases if case["regime"] != "replacing"}


def _absolute_row(case: Case) -> list[str]:
    low, high = case["ratio_to_fused_adamw"]["quartiles"]
    rate, share = case.get("gb_per_s"), case.get("share_of_copy")
    return [
        f"{case['workload']}, {case['provider']}, {case['regime']}",
        f"{case['seconds'] * 1e3:.3g}",
        f"{case['baseline_seconds'] * 1e3:.3g}",
        f"{low:.2f} to {high:.2f}",
        "-" if rate is None else f"{rate:.1f}",
        "-" if share is None else f"{share:.2f}",
    ]


def _only_on_cuda(results: Results) -> list[str]:
    """Return what is measured of a GPU alone."""
    if results["device"]["type"] == "cpu":
        return []
    header = ["case", "host µs", "wall ms", "kernels", "copies", "calls"]
    header += ["allocations", "MiB more in a step", "notes"]
    sections = [
        "Times above are the device's. Host: what a step keeps it, the device not waited for; "
        "wall: of a step and waiting for it; calls: by which the host launches kernels or graphs.",
        _table(header, map(_host_row, results["cases"])),
    ]
    if "parity" in results:
        sections += ["Errors against the reference in float64:", parity_table(results["parity"])]
    return sections


def _host_row(case: Case) -> list[str]:
    notes = ["its state fits in the L2"] * case["fits_in_cache"]
    if case["queued"] < 1:
        notes.append(f"{1 - case['queued']:.0%} of the device's times hold the host's")
    return [
        f"{case['workload']}, {case['provider']}, {case['regime']}",
        f"{case['host_seconds'] * 1e6:.0f}",
        f"{case['wall_seconds'] * 1e3:.3g}",
        str(case["launches"]["kernels"] or "-"),
        str(case["launches"]["copies"]),
        str(case["launches"]["calls"] or "-"),
        str(case["allocations"]),
        f"{case['peak_growth_bytes'] / _MIB:.2f}",
        "; ".join(notes),
    ]


def parity_table(parity: dict[str, Any]) -> str:
    """Return the table of `bench.parity`'s figures."""
    rows = [
        [
            f"{entry['optimizer']} C={entry['capacity']}, {name}",
            f"{errors['fused']:.2e}",
            f"{errors['eager']:.2e}",
            "-" if errors["ratio"] is None else f"{errors['ratio']:.2f}",
        ]
        for entry in parity["runs"]
        for name, errors in entry["largest_errors"].items()
    ]
    fused = f"{parity['backend']} float32"
    return _table([f"{parity['steps']} steps", fused, "eager float32", "ratio"], rows)


def summary(results: Results) -> str:
    """Return what is most worth knowing in some thousand characters, a line a steady case."""
    rows = [
        [
            f"{case['workload']}, {case['provider']}",
            f"{case['seconds'] * 1e3:.3g}",
            _cell(case),
            f"{case['gb_per_s']:.0f} ({case['share_of_copy']:.2f})" if "gb_per_s" in case else "-",
            f"{case['host_seconds'] * 1e6:.0f}" if "host_seconds" in case else "-",
            str(case["launches"]["kernels"] or "-") if "launches" in case else "-",
        ]
        for case in _steady(results)
    ]
    head = ["case", "ms", "of AdamW", "GB/s (of copy)", "host µs", "kernels"]
    lines = [
        f"Measured {results['date']} on {_described(results['device'])}; "
        f"torch {results['versions']['torch']}. A copy moves {results['copy_gb_per_s']:.0f} GB/s.",
        *(f"{a:<42}{b:>8}{c:>13}{d:>15}{e:>8}{f:>8}" for a, b, c, d, e, f in [head, *rows]),
    ]
    reasons = Counter(entry["reason"] for entry in results["left_out"])
    lines += [f"left out, {count} times: {reason}" for reason, count in reasons.items()]
    lines += [" | ".join(target.row()) for target in targets(results)]
    for run in results.get("parity", {"runs": []})["runs"]:
        errors = run["largest_errors"]["parameters"]
        lines.append(
            f"{run['optimizer']} C={run['capacity']}, largest error of the parameters: "
            f"{errors['fused']:.2e}, eager {errors['eager']:.2e}"
        )
    return "\n".join(lines)


def _steady(results: Results) -> list[Case]:
    """Return the cases whose every step replaces a slot, and those without a buffer."""
    return [case for case in results["cases"] if case["regime"] in ("replacing", "no buffer")]


def save_figure(results: Results, path: Path) -> None:
    """Draw measured ratios beside the predicted ones, a panel for each workload."""
    from matplotlib.figure import Figure

    panels = [(name, list(group)) for name, group in groupby(results["cases"], _workload)]
    labels = list(dict.fromkeys(map(_label, results["cases"])))
    figure = Figure(figsize=(14, 9), layout="constrained")
    axes = figure.subplots(2, -(-len(panels) // 2), sharey=True, squeeze=False).flat
    for axis, (name, cases) in zip(axes, panels, strict=False):
        _draw(axis, name, cases, labels)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    figure.supxlabel("time of a step, relative to torch's fused AdamW (lower is better)")
    figure.savefig(path, dpi=110)


def _workload(case: Case) -> str:
    return str(case["workload"])


def _label(case: Case) -> str:
    regime = "" if case["regime"] == "no buffer" else f", {case['regime']}"
    return f"{case['provider']}{regime}"


def _draw(axis: "Axes", name: str, cases: list[Case], labels: list[str]) -> None:
    heights = [labels.index(_label(case)) for case in cases]
    medians = [case["ratio_to_fused_adamw"]["median"] for case in cases]
    quartiles = [case["ratio_to_fused_adamw"]["quartiles"] for case in cases]
    spread = [
        [middle - low for middle, (low, _) in zip(medians, quartiles, strict=True)],
        [high - middle for middle, (_, high) in zip(medians, quartiles, strict=True)],
    ]
    predicted = [
        (case["predicted_ratio"], height)
        for case, height in zip(cases, heights, strict=True)
        if "predicted_ratio" in case
    ]
    from matplotlib.ticker import FormatStrFormatter

    axis.axvline(1, color="0.5", linewidth=1, label="fused AdamW")
    axis.errorbar(
        medians, heights, xerr=spread, fmt="o", markersize=6, capsize=3, color=_MEASURED,
        label="measured, median and quartiles",
    )  # fmt: skip
    if predicted:
        axis.plot(
            *zip(*predicted, strict=True), "D", markersize=9, fillstyle="none", color=_PREDICTED,
            label="predicted by the bytes moved",
        )  # fmt: skip
    for median, height in zip(medians, heights, strict=True):
        axis.text(
            0.98, height, f"{median:.2f}", transform=axis.get_yaxis_transform(), ha="right",
            va="center",
        )  # fmt: skip
    axis.set_title(name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FormatStrFormatter("%.3g"))
    axis.set_yticks(range(len(labels)), labels)
    axis.grid(axis="both", color="0.9")
    axis.set_axisbelow(True)
    low, high = axis.get_xlim()
    axis.set_xlim(low / 1.2, high * 3)  # room for the numbers


def update_readme(results: Results, readme: Path) -> None:
    """Replace what stands between the markers.

    Raises:
        ValueError: The file does not have each marker once, in order, or the run was a smoke run.
    """
    if results["smoke"]:
        raise ValueError("the results must be those of a full run, got a smoke run's")
    text = readme.read_text()
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end or _BEGIN in rest or _END in after:
        raise ValueError(f"{readme.name} must have the lines {_BEGIN} and {_END}, once each")
    readme.write_text(f"{before}{begin}\n\n{main_table(results)}\n\n{end}{after}")


def write(path: Path, readme: Path | None = None) -> None:
    """Print the tables of a results file and put the figure beside it.

    Args:
        path: The results file.
        readme: A file whose table to replace.
    """
    results: Results = json.loads(path.read_text())
    print(markdown(results))
    if find_spec("matplotlib") is None:
        print("\nNo figure: matplotlib is not installed")
    else:
        save_figure(results, path.with_suffix(".png"))
        print(f"\nWrote {path.with_suffix('.png').name} beside {path.name}")
    if readme is not None:
        update_readme(results, readme)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what bench.run wrote")
    parser.add_argument("--readme", type=Path, help="file whose table to replace")
    parser.add_argument("--summary", action="store_true", help="print few lines; write nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(json.loads(arguments.results.read_text())))
        return
    write(arguments.results, arguments.readme)


if __name__ == "__main__":
    main()
