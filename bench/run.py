"""All measurements into one results file: `python -m bench.run [--smoke] [--device cuda]`."""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine, memory, parity, report
from bench.cases import cases

_BENCH = Path(__file__).parent
_DIGITS = 5
_SMOKE_ELEMENTS = 1_000_000
# The same in all cases: kept once.
_COMMON = ("device", "versions", "copy_gb_per_s")


def _default_name(device_type: str) -> str:
    device = machine.device(device_type)
    model = re.sub(r"[^a-z0-9]+", "-", str(device["model"]).lower()).strip("-")
    torch_version = machine.versions()["torch"].split("+")[0]
    if device_type == "cuda":
        return f"{model}-torch{torch_version}.json"
    return f"{device['type']}-{model}-{device['cores']}core-torch{torch_version}.json"


def _throughput(raw: Path, smoke: bool, device_type: str) -> list[dict[str, Any]]:
    """Run pytest-benchmark and return what each case recorded."""
    tests = str(_BENCH / "test_throughput.py")
    options = ["-q", "--benchmark-quiet", f"--benchmark-json={raw}", *["--smoke"] * smoke]
    options += ["--device", device_type]
    # A case that fails is missing from the results, which say so; the others' time is not lost.
    subprocess.run([sys.executable, "-m", "pytest", tests, *options], check=False)
    if not raw.exists():
        sys.exit("bench: nothing was measured")
    return [benchmark["extra_info"] for benchmark in json.loads(raw.read_text())["benchmarks"]]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _compact(recorded: list[dict[str, Any]], smoke: bool, device_type: str) -> dict[str, Any]:
    """Return the results file without the memory: no raw rounds, nothing twice."""
    common = {key: recorded[0][key] for key in _COMMON}
    own = [{k: v for k, v in case.items() if k not in _COMMON} for case in recorded]
    measured = {(case["workload"], case["provider"], case["regime"]) for case in own}
    failed = [
        case.name
        for case in cases(smoke, device_type)
        if case.left_out is None
        and (case.workload.name, case.provider.name, case.regime.name) not in measured
    ]
    left_out = {
        (case.workload.name, case.provider.name): case.left_out
        for case in cases(smoke, device_type)
        if case.left_out is not None
    }
    return {
        "date": datetime.date.today().isoformat(),
        "smoke": smoke,
        **_rounded(common),
        "cases": _rounded(own),
        "failed": failed,
        "left_out": [
            {"workload": workload, "provider": provider, "reason": reason}
            for (workload, provider), reason in left_out.items()
        ],
    }


def main() -> None:
    """Measure, write the results and print the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that it runs, proves nothing"
    )
    parser.add_argument("--out", type=Path, help="results file, default in bench/results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    arguments = parser.parse_args()
    smoke, device_type = arguments.smoke, arguments.device
    with tempfile.TemporaryDirectory() as directory:
        temporary = Path(directory)
        default = temporary if smoke else _BENCH / "results"
        out = arguments.out or default / _default_name(device_type)
        load = os.getloadavg()[0]
        recorded = _throughput(temporary / "raw.json", smoke, device_type)
        results = _compact(recorded, smoke, device_type)
        results["load_before"] = _rounded(load)
        if device_type == "cuda":
            results["parity"] = _rounded(parity.measure(device_type))
        else:
            results["memory"] = memory.measure(*[_SMOKE_ELEMENTS] * smoke)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        report.write(out)
        if results["failed"]:
            sys.exit(f"bench: failed: {'; '.join(results['failed'])}")


if __name__ == "__main__":
    main()
