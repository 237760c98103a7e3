"""All measurements into one results file: `python -m bench.speed [--smoke] [--out FILE]`."""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine
from bench.speed import memory, report
from bench.speed.cases import cases

_RESULTS = Path(__file__).parents[1] / "results"
_DIGITS = 5
_SMOKE_ELEMENTS = 1_000_000
_SMOKE_CASES = "ResNet and not eager"
# A case that hangs is given this much after the time is up.
_GRACE_SECONDS = 20.0
# The same in all cases: kept once.
_COMMON = ("device", "versions", "copy_gb_per_s")


class _CutOffError(Exception):
    """The process was asked to end."""


def _cut_off(*_: object) -> None:
    # Once: what is left to do is to write down what was measured.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _CutOffError


def default_name(device: str) -> str:
    """Return the name of a device's results file."""
    described = machine.describe(device)
    model = re.sub(r"[^a-z0-9]+", "-", str(described["model"]).lower()).strip("-")
    torch_version = machine.versions()["torch"].split("+")[0]
    if device == "cpu":
        return f"cpu-{model}-{described['cores']}core-torch{torch_version}.json"
    return f"{model}-torch{torch_version}.json"


def _throughput(
    directory: Path, device: str, smoke: bool, seconds: float | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Run the throughput benchmarks.

    Args:
        directory: For temporary files.
        device: What is measured.
        smoke: Whether to shrink the workloads to nothing.
        seconds: After which no further case is begun.

    Returns:
        What each case recorded, and what went wrong, if anything.
    """
    record = directory / "cases.jsonl"
    record.touch()
    command = [sys.executable, "-m", "bench.speed.throughput", str(record), f"--device={device}"]
    command += ["--smoke"] * smoke
    timeout = None
    if seconds is not None:
        command.append(f"--deadline={time.time() + seconds}")
        timeout = seconds + _GRACE_SECONDS
    problem = None
    try:
        if subprocess.run(command, timeout=timeout).returncode != 0:
            problem = "it failed, or one before it ended the process: the log says which"
    except subprocess.TimeoutExpired:
        problem = "the time was up before it or in it"
    except _CutOffError:
        problem = "the run was cut off before it or in it"
    return [json.loads(line) for line in record.read_text().splitlines()], problem


def _smoke_pytest_benchmark(device: str) -> bool:
    """Run some cases under pytest-benchmark, as users do; return whether they passed."""
    suite = str(Path(__file__).with_name("test_throughput.py"))
    command = [sys.executable, "-m", "pytest", "-q", suite, "-k", _SMOKE_CASES, "--benchmark-only"]
    # No table of times whose sizes mean nothing.
    command.append("--benchmark-quiet")
    return subprocess.run([*command, "--smoke", f"--device={device}"]).returncode == 0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _compact(
    recorded: list[dict[str, Any]], device: str, smoke: bool, problem: str | None
) -> dict[str, Any]:
    """Return the results file without the memory: no raw rounds, nothing twice."""
    common = {key: recorded[0][key] for key in _COMMON}
    all_cases = cases(device, smoke)
    workloads = list(dict.fromkeys(case.workload.name for case in all_cases))
    recorded.sort(key=lambda case: workloads.index(case["workload"]))
    own = [{k: v for k, v in case.items() if k not in _COMMON} for case in recorded]
    measured = {(case["workload"], case["provider"], case["regime"]) for case in recorded}
    left_out: dict[tuple[str, str], str] = {}
    for case in all_cases:
        key = (case.workload.name, case.provider.name)
        if case.left_out is not None:
            left_out[key] = case.left_out
        elif (*key, case.regime.name) not in measured:
            left_out[key[0], f"{key[1]}, {case.regime.name}"] = problem or "the time was up"
    return {
        "date": datetime.date.today().isoformat(),
        "smoke": smoke,
        **_rounded(common),
        "cases": _rounded(own),
        "left_out": [
            {"workload": workload, "provider": provider, "reason": reason}
            for (workload, provider), reason in left_out.items()
        ],
    }


def _memory(device: str, smoke: bool) -> list[dict[str, float]]:
    try:
        return memory.measure(device, *[_SMOKE_ELEMENTS] * smoke)
    except _CutOffError:
        return []


def main() -> None:
    """Measure, write the results and print the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that it runs, proves nothing"
    )
    parser.add_argument("--out", type=Path, help="results file, default in bench/results")
    parser.add_argument(
        "--device",
        choices=machine.DEVICES,
        default=machine.default_device(),
        help="what is measured, default a GPU where there is one",
    )
    parser.add_argument(
        "--seconds", type=float, help="begin no further case after these; what is left out is told"
    )
    arguments = parser.parse_args()
    device, smoke = arguments.device, arguments.smoke
    signal.signal(signal.SIGTERM, _cut_off)
    with tempfile.TemporaryDirectory() as directory:
        temporary = Path(directory)
        default = temporary if smoke else _RESULTS
        out = arguments.out or default / default_name(device)
        load = os.getloadavg()[0]
        recorded, problem = _throughput(temporary, device, smoke, arguments.seconds)
        if not recorded:
            sys.exit("bench: no case was measured; nothing was written")
        results = _compact(recorded, device, smoke, problem)
        results["load_before"] = _rounded(load)
        was_cut_off = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        results["memory"] = [] if was_cut_off else _memory(device, smoke)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if smoke:
            print(f"{len(recorded)} cases ran. Their sizes are tiny, their times mean nothing.")
        else:
            print(f"{report.markdown_report(results)}\n\nWritten to {out}")
        if problem is not None:
            sys.exit(f"bench: not every case was measured: {problem}")
    if smoke and not _smoke_pytest_benchmark(device):
        sys.exit("bench: a case failed under pytest-benchmark")


if __name__ == "__main__":
    main()
