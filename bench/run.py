"""All measurements into one results file: `python -m bench.run [--smoke] [--out RESULTS.json]`."""

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

from bench import machine, memory, report
from bench.cases import cases

_BENCH = Path(__file__).parent
_DIGITS = 5
_SMOKE_ELEMENTS = 1_000_000
# The same in all cases: kept once.
_COMMON = ("device", "versions", "copy_gb_per_s")


def _default_name() -> str:
    device = machine.device()
    model = re.sub(r"[^a-z0-9]+", "-", str(device["model"]).lower()).strip("-")
    torch_version = machine.versions()["torch"].split("+")[0]
    return f"{device['type']}-{model}-{device['cores']}core-torch{torch_version}.json"


def _throughput(raw: Path, smoke: bool) -> list[dict[str, Any]]:
    """Run pytest-benchmark and return what each case recorded."""
    tests = str(_BENCH / "test_throughput.py")
    options = ["-q", "--benchmark-quiet", f"--benchmark-json={raw}", *["--smoke"] * smoke]
    finished = subprocess.run([sys.executable, "-m", "pytest", tests, *options])
    if finished.returncode != 0:
        sys.exit("bench: a benchmark failed; nothing was written")
    return [benchmark["extra_info"] for benchmark in json.loads(raw.read_text())["benchmarks"]]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _compact(recorded: list[dict[str, Any]], smoke: bool) -> dict[str, Any]:
    """Return the results file without the memory: no raw rounds, nothing twice."""
    common = {key: recorded[0][key] for key in _COMMON}
    own = [{k: v for k, v in case.items() if k not in _COMMON} for case in recorded]
    left_out = {
        (case.workload.name, case.provider.name): case.left_out
        for case in cases(smoke)
        if case.left_out is not None
    }
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


def main() -> None:
    """Measure, write the results and print the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that it runs, proves nothing"
    )
    parser.add_argument("--out", type=Path, help="results file, default in bench/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        temporary = Path(directory)
        default = temporary if arguments.smoke else _BENCH / "results"
        out = arguments.out or default / _default_name()
        load = os.getloadavg()[0]
        results = _compact(_throughput(temporary / "raw.json", arguments.smoke), arguments.smoke)
        results["load_before"] = _rounded(load)
        results["memory"] = memory.measure(*[_SMOKE_ELEMENTS] * arguments.smoke)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        report.write(out)


if __name__ == "__main__":
    main()
