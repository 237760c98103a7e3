"""Tables of a results file: `python -m bench.speed.report RESULTS.json [--readme FILE ...]`."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import markdown
from bench.speed import predict

Results = dict[str, Any]
Case = dict[str, Any]
# What is held to a bound: a name, the figure (None where it was left out), the bound.
Target = tuple[str, float | None, float]

_LARGE, _SMALL, _GPT2 = "one 30 M tensor", "1000 tensors of 256", "GPT-2 small"
_HUGE, _RESNET, _TINY = "one 1 B tensor", "ResNet-50", "10,000 tensors of 16"
_FUSED = ("AdamCM C=5", "AdamCM C=20")
# The columns of the README's table, and the providers that the page on benchmarks has alone.
_SUMMARIZED = (_LARGE, _RESNET, _GPT2, _SMALL)
_NOT_SUMMARIZED = (
    *("AdamW default", "AdamCM C=20", "AdamCG C=5", "AdamCM bfloat16"),
    *("AdamCM C=5 eager", "AdamCM C=5 compiled"),
)
_MIB = 2**20


def main_table(results: Results) -> str:
    """Return the whole table: every provider, steady state, and what was measured how."""
    steady = _steady(results)
    rounds = [case["rounds"] for case in steady]
    pairs = f"{min(rounds)} to {max(rounds)}" if rounds else "no"
    return "\n\n".join(
        [
            _pivot("workload", steady, lambda c: c["workload"], lambda c: c["provider"]),
            "Time of a step divided by that of `torch.optim.AdamW(fused=True)`: **lower is "
            "better**. Median of the ratios of paired steps, each right after one of the baseline "
            f"in the same process ({pairs} pairs); every step replaces a "
            "slot. In brackets what the byte model predicts, where memory is the limit; "
            "-: left out.",
            _measured(results),
        ]
    )


def summary_table(results: Results) -> str:
    """Return what the README shows: a few workloads, a provider each row, all of one run."""
    cases = [case for case in _steady(results) if case["workload"] in _SUMMARIZED]
    rows: dict[str, dict[str, str]] = {}
    for case in cases:
        if case["provider"] in _NOT_SUMMARIZED:
            continue
        ratio = f"{case['ratio_to_fused_adamw']['median']:.2f}"
        rows.setdefault(case["provider"], {})[case["workload"]] = ratio
    body = [[name, *(row.get(key, "-") for key in _SUMMARIZED)] for name, row in rows.items()]
    return "\n\n".join(
        [
            markdown.table(["step", *_SUMMARIZED], body),
            "Time of a step divided by that of `torch.optim.AdamW(fused=True)`: **lower is "
            f"better**; -: left out. {_measured(results)}",
        ]
    )


def _steady(results: Results) -> list[Case]:
    """Return the cases in which every step replaces a slot, or there is no buffer."""
    return [case for case in results["cases"] if case["regime"] in ("replacing", "no buffer")]


def _measured(results: Results) -> str:
    """Return when, on which machine and at which commit the results were measured."""
    versions = results["versions"]
    return (
        f"Measured {results['date']} on {_described(results['device'])}; torch "
        f"{versions['torch']}, Python {versions['python']}, cm_fused {versions['cm_fused']} at "
        f"{versions['commit']}; load average before: {results['load_before']:.2f}."
    )


def markdown_report(results: Results) -> str:
    """Return the whole report."""
    with_buffer = [case for case in results["cases"] if case["regime"] != "no buffer"]
    in_regimes = {case["provider"] for case in with_buffer if case["regime"] != "replacing"}
    several = [case for case in with_buffer if case["provider"] in in_regimes]
    left_out = [
        f"- {entry['workload']}, {entry['provider']}: {entry['reason']}"
        for entry in results["left_out"]
    ]
    by_regime = _pivot(
        "workload, provider",
        several,
        lambda c: f"{c['workload']}, {c['provider']}",
        lambda c: c["regime"],
    )
    header = ["case", "ms", "AdamW ms", "quartiles of the ratio", "GB/s", "share of a copy"]
    sections = [main_table(results), "By regime:", by_regime]
    sections += [f"Absolute (a copy moves {results['copy_gb_per_s']:.1f} GB/s):"]
    sections += [markdown.table(header, map(_absolute_row, results["cases"]))]
    if results["device"]["type"] != "cpu":
        sections += _only_on_cuda(results)
    sections += ["Left out:", "\n".join(left_out) or "nothing"]
    return "\n\n".join([*sections, "Targets:", targets_table(results)])


def _pivot(
    corner: str, cases: list[Case], row: Callable[[Case], str], column: Callable[[Case], str]
) -> str:
    """Return a table of measured (predicted) ratios; rows and columns in order of appearance."""
    if not cases:
        return "Nothing was measured."
    cells = {(row(case), column(case)): _cell(case) for case in cases}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    body = [[name, *(cells.get((name, key), "-") for key in columns)] for name in rows]
    return markdown.table([corner, *columns], body)


def _cell(case: Case) -> str:
    measured = f"{case['ratio_to_fused_adamw']['median']:.2f}"
    predicted = case.get("predicted_ratio")
    return measured if predicted is None else f"{measured} ({predicted:.2f})"


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


def _name(case: Case) -> str:
    return f"{case['workload']}, {case['provider']}, {case['regime']}"


def _absolute_row(case: Case) -> list[str]:
    low, high = case["ratio_to_fused_adamw"]["quartiles"]
    rate, share = case.get("gb_per_s"), case.get("share_of_copy")
    return [
        _name(case),
        f"{case['seconds'] * 1e3:.3g}",
        f"{case['baseline_seconds'] * 1e3:.3g}",
        f"{low:.2f} to {high:.2f}",
        "-" if rate is None else f"{rate:.1f}",
        "-" if share is None else f"{share:.2f}",
    ]


HOST_TIME_HEADER = f"{'microseconds a step':47} AdamCM   AdamW  ratio  target"


def host_time_line(row: dict[str, Any]) -> str:
    """Return the line of a case of `bench.speed.host_time`."""
    ours, theirs = row["microseconds"]
    target = "-" if row["target"] is None else f"{row['target']:.1f}"
    return f"{row['name']:47} {ours:6.0f} {theirs:7.0f} {row['ratio']:6.2f} {target:>7}"


def _only_on_cuda(results: Results) -> list[str]:
    """Return what is measured of a GPU alone."""
    header = ["case", "host µs", "wall ms", "kernels", "copies", "calls"]
    header += ["allocations", "MiB more in a step", "notes"]
    sections = [
        "Times above are the device's. Host: what a step keeps it, the device not waited for; "
        "wall: of a step and waiting for it; calls: by which the host launches kernels or graphs.",
        markdown.table(header, map(_host_row, results["cases"])),
    ]
    if "host_time" in results:
        lines = [HOST_TIME_HEADER, *map(host_time_line, results["host_time"])]
        sections += ["What a step costs the host (`bench.speed.host_time`):"]
        sections += ["\n".join(["```", *lines, "```"])]
    sections += ["Predicted and measured:", predict.table(results)]
    if "parity" in results:
        sections += ["Errors against the reference in float64:", parity_table(results["parity"])]
    return sections


def _host_row(case: Case) -> list[str]:
    notes = ["its state fits in the L2"] * case["fits_in_cache"]
    if case["queued"] < 1:
        notes.append(f"{1 - case['queued']:.0%} of the device's times hold the host's")
    return [
        _name(case),
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
    """Return the table of `bench.reliability.parity`'s figures."""
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
    return markdown.table([f"{parity['steps']} steps", fused, "eager float32", "ratio"], rows)


def targets_table(results: Results) -> str:
    """Return the figures that the optimizer is held to on the device that was measured."""
    of_device = _cpu_targets if results["device"]["type"] == "cpu" else _gpu_targets
    rows = [*of_device(results), *_memory_targets(results)]
    return markdown.table(["target", "measured", "bound", "result"], map(_target_row, rows))


def _target_row(target: Target) -> list[str]:
    name, measured, bound = target
    if measured is None:
        return [name, "not measured", f"{bound:.3f}", "-"]
    met = "met" if measured <= bound else "NOT MET"
    return [name, f"{measured:.3f}", f"{bound:.3f}", met]


def _case(results: Results, workload: str, provider: str) -> Case | None:
    wanted = (workload, provider, "replacing")
    keys = ("workload", "provider", "regime")
    found = (case for case in results["cases"] if tuple(case[key] for key in keys) == wanted)
    return next(found, None)


def _ratio(results: Results, workload: str, provider: str = _FUSED[0]) -> float | None:
    case = _case(results, workload, provider)
    return None if case is None else float(case["ratio_to_fused_adamw"]["median"])


def _cpu_targets(results: Results) -> list[Target]:
    five, twenty = (_ratio(results, _LARGE, provider) for provider in _FUSED)
    apart = None if five is None or twenty is None else abs(twenty / five - 1)
    return [
        (f"time ratio, {_LARGE}, C=5, replacing", five, 1.65),
        (f"time ratio, {_LARGE}, C=20, replacing", twenty, 1.65),
        (f"C=20 against C=5, {_LARGE}, relative difference", apart, 0.05),
        (f"time ratio, {_SMALL}, C=5, replacing", _ratio(results, _SMALL), 0.4),
        (f"time ratio, {_GPT2}, C=5, replacing", _ratio(results, _GPT2), 1.65),
    ]


def _gpu_targets(results: Results) -> Iterable[Target]:
    for workload in (_HUGE, _GPT2):
        case = _case(results, workload, _FUSED[0])
        inverse = None if case is None else 1 / case["share_of_copy"]
        yield f"copy's bandwidth over the step's, {workload}, C=5", inverse, 1 / 0.9
        yield f"time ratio, {workload}, C=5, replacing", _ratio(results, workload), 1.65
    for workload in (_RESNET, _TINY):
        yield f"time ratio, {workload}, C=5", _ratio(results, workload), 1.0
    fused = [case for case in results["cases"] if case["provider"] in _FUSED]
    launched = (case["launches"]["kernels"] + case["launches"]["copies"] for case in fused)
    # 0 where the profiler did not see the device.
    yield "launches a step of AdamCM", max(filter(None, launched), default=None), 2
    allocated = max((case["allocations"] for case in fused), default=None)
    yield "allocations a step of AdamCM", allocated, 0
    runs = results.get("parity", {"runs": []})["runs"]
    ratios = (run["largest_errors"]["parameters"]["ratio"] for run in runs)
    known = (ratio for ratio in ratios if ratio is not None)
    yield "parameters' error over eager float32's", max(known, default=None), 2


def _memory_targets(results: Results) -> Iterable[Target]:
    for entry in results["memory"]:
        capacity = entry["capacity"]
        # Keys, step and pending slot are some bytes a tensor: nothing at this precision.
        state = round(entry["state_bytes_per_element"], 3)
        yield f"state, bytes per element, C={capacity}", state, 4 * (capacity + 3)
        growth = entry["peak_growth_bytes"] / _MIB
        # One MiB and a hundredth of the parameters.
        allowed = 1 + 0.01 * 4 * entry["elements"] / _MIB
        yield f"peak growth of memory in a step, MiB, C={capacity}", growth, allowed


def update_readme(results: Results, readme: Path, section: str) -> None:
    """Replace a page's table: the summary if it has that one's markers, otherwise the whole.

    Args:
        results: Of a run.
        readme: The page.
        section: Name of the whole table's markers: the results file's, of which a page may have
            several.

    Raises:
        ValueError: The file does not have the table's markers, or the run was a smoke run.
    """
    if results["smoke"]:
        raise ValueError("the results must be those of a full run, got a smoke run's")
    if "<!-- summary:begin -->" in readme.read_text():
        markdown.replace_section(readme, "summary", summary_table(results))
    else:
        markdown.replace_section(readme, section, main_table(results))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what bench.speed wrote")
    parser.add_argument(
        "--readme",
        type=Path,
        action="append",
        default=[],
        help="page whose table to replace: README.md, docs/benchmarks.md",
    )
    parser.add_argument("--summary", action="store_true", help="print the main tables only")
    arguments = parser.parse_args()
    results: Results = json.loads(arguments.results.read_text())
    if arguments.summary:
        print(f"{main_table(results)}\n\n{targets_table(results)}")
        return
    print(markdown_report(results))
    for page in arguments.readme:
        update_readme(results, page, arguments.results.stem)


if __name__ == "__main__":
    main()
