"""Tables and figure of a results file: `python -m bench.report RESULTS.json [--readme FILE]`."""

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

Results = dict[str, Any]
Case = dict[str, Any]

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"
_LARGE, _SMALL, _GPT2 = "one 30 M tensor", "1000 tensors of 256", "GPT-2 small"
_HUGE, _RESNET, _TINY = "one 1 B tensor", "ResNet-50", "10,000 tensors of 16"
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


def _case(results: Results, workload: str, capacity: int) -> Case | None:
    wanted = (workload, f"AdamCM C={capacity}", "replacing")
    for case in results["cases"]:
        if (case["workload"], case["provider"], case["regime"]) == wanted:
            return cast(Case, case)
    return None


def _ratio(results: Results, workload: str, capacity: int) -> float | None:
    case = _case(results, workload, capacity)
    return None if case is None else float(case["ratio_to_fused_adamw"]["median"])


def targets(results: Results) -> list[Target]:
    """Return the acceptance figures of the device that was measured."""
    if results["device"]["type"] == "cuda":
        return _gpu_targets(results)
    five, twenty = (_ratio(results, _LARGE, capacity) for capacity in (5, 20))
    apart = None if five is None or twenty is None else abs(twenty / five - 1)
    return [
        Target(f"time ratio, {_LARGE}, C=5, replacing", five, 1.65),
        Target(f"time ratio, {_LARGE}, C=20, replacing", twenty, 1.65),
        Target(f"C=20 against C=5, {_LARGE}, relative difference", apart, 0.05),
        Target(f"time ratio, {_SMALL}, C=5, replacing", _ratio(results, _SMALL, 5), 0.4),
        Target(f"time ratio, {_GPT2}, C=5, replacing", _ratio(results, _GPT2, 5), 1.65),
        *(target for entry in results["memory"] for target in _memory_targets(entry)),
    ]


def _gpu_targets(results: Results) -> list[Target]:
    found = []
    for workload in (_HUGE, _GPT2):
        case = _case(results, workload, 5)
        share = None if case is None else 1 / case["share_of_copy"]
        ratio = _ratio(results, workload, 5)
        found.append(Target(f"copy's bandwidth over the step's, {workload}, C=5", share, 1 / 0.9))
        found.append(Target(f"time ratio, {workload}, C=5, replacing", ratio, 1.65))
    for workload in (_RESNET, _TINY):
        found.append(Target(f"time ratio, {workload}, C=5", _ratio(results, workload, 5), 1.0))
    steady = [
        case
        for case in results["cases"]
        if case["provider"].startswith("AdamCM C=")
        and "device_operations" in case
        and "eager" not in case["provider"]
        and "compiled" not in case["provider"]
    ]
    for name, key, bound in (
        ("launches a step of AdamCM", "device_operations", 2),
        ("allocations a step of AdamCM", "allocations", 0),
    ):
        most = max((case[key] for case in steady), default=None)
        found.append(Target(name, most, bound))
    ratios = [entry["ratio"] for entry in results["parity"]]
    found.append(Target("error over eager float32's", max(ratios, default=None), 2.0))
    return found


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
    steady = [case for case in results["cases"] if case["regime"] in ("replacing", "no buffer")]
    rounds = [case["rounds"] for case in steady]
    return "\n\n".join(
        [
            _pivot("workload", steady, lambda c: c["workload"], lambda c: c["provider"]),
            "Time of a step divided by that of `torch.optim.AdamW(fused=True)`: **lower is "
            "better**. Median of the ratios of paired steps, each right after one of the baseline "
            f"in the same process ({min(rounds)} to {max(rounds)} pairs); every step replaces a "
            "slot. In brackets what the byte model predicts, where memory is the limit; "
            "-: left out.",
            f"Measured {results['date']} on {_machine(device)}; torch {versions['torch']}, "
            f"Python {versions['python']}, cm_fused {versions['cm_fused']} at "
            f"{versions['commit']}; load average before: {results['load_before']:.2f}.",
        ]
    )


def _machine(device: dict[str, Any]) -> str:
    if device["type"] == "cuda":
        kernel = device["priority_kernel"]
        return f"{device['model']}, {device['memory_gib']} GiB, priority kernel: {kernel}"
    return (
        f"{device['model']}, {device['cores']} cores, {device['threads']} threads, "
        f"{device['cache']}, {device['memory_gib']} GiB, {device['instructions']}"
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
                [
                    *("case", "ms", "AdamW ms", "quartiles of the ratio", "GB/s"),
                    *("share of a copy", "host ms", "launches", "allocations"),
                ],
                map(_absolute_row, results["cases"]),
            ),
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
        f"{case['host_seconds'] * 1e3:.3g}" if "device_operations" in case else "-",
        *(str(case.get(key, "-")) for key in ("device_operations", "allocations")),
    ]


def save_figure(results: Results, path: Path) -> None:
    """Draw measured ratios beside the predicted ones, a panel for each workload."""
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


def _draw(axis: Axes, name: str, cases: list[Case], labels: list[str]) -> None:
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
    if results["failed"]:
        raise ValueError(f"the results must be complete, got failures: {results['failed']}")
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
    save_figure(results, path.with_suffix(".png"))
    print(markdown(results))
    print(f"\nWrote {path.with_suffix('.png').name} beside {path.name}")
    if readme is not None:
        update_readme(results, readme)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what bench.run wrote")
    parser.add_argument("--readme", type=Path, help="file whose table to replace")
    arguments = parser.parse_args()
    write(arguments.results, arguments.readme)


if __name__ == "__main__":
    main()
