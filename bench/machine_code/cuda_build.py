"""The CUDA build, which needs a toolkit but no device: `python -m bench.machine_code.cuda_build`.

Builds both libraries with the installed torch, every symbol resolved as they are linked; loads them
in a process of their own; compares the operators that they register with those that the sources
name; and asks the package what it finds. What was run and found goes to a file.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine

_REPOSITORY = Path(__file__).parents[2]
_RESULTS = _REPOSITORY / "bench" / "results" / "cuda_build.json"
_LIBRARIES = ("cm_fused/_C.abi3.so", "cm_fused/_C_cuda.abi3.so")
_COMMAND = ("setup.py", "--quiet", "build_ext")
_ENVIRONMENT = {"CM_FUSED_BUILD": "cuda", "LDFLAGS": "-Wl,--no-undefined"}

# Prints the keys for which each operator has a kernel of its own.
_REGISTERED = """
import json, sys, torch, cm_fused
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("cm_fused::")]
keys = json.loads(sys.argv[1])
print(json.dumps({n.split("::")[1]: [k for k in keys if has(n, k)] for n in sorted(names)}))
"""


def missing_requirement() -> str | None:
    """Return why nothing can be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return "nvcc is not installed" if shutil.which("nvcc") is None else None


def _implementations() -> Iterator[tuple[str, str]]:
    """Yield every operator that the sources implement, with its dispatch key."""
    for source in sorted((_REPOSITORY / "csrc").rglob("*.c*")):
        blocks = source.read_text().split("STABLE_TORCH_LIBRARY_IMPL(cm_fused, ")[1:]
        for block in blocks:
            key, body = re.split(r", m\) \{", block.split("\n}")[0], maxsplit=1)
            for operator in re.findall(r'm\.impl\(\s*"(\w+)"', body):
                yield operator, key


def expected_operators() -> dict[str, list[str]]:
    """Return the operators of csrc with their dispatch keys, all of them sorted."""
    found: dict[str, set[str]] = {}
    for operator, key in _implementations():
        found.setdefault(operator, set()).add(key)
    return {operator: sorted(found[operator]) for operator in sorted(found)}


def build(folder: Path) -> None:
    """Put a package with both libraries into a folder.

    Raises:
        CalledProcessError: It did not build; the compilers have said why.
    """
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(_REPOSITORY / "cm_fused", folder / "cm_fused", ignore=ignored)
    work = folder / "work"
    shutil.copytree(_REPOSITORY / "csrc", work / "csrc")
    for name in ("setup.py", "README.md"):
        shutil.copy(_REPOSITORY / name, work)
    where = ("--build-lib", str(folder), "--build-temp", str(work / "temp"))
    environment = {**os.environ, **_ENVIRONMENT}
    subprocess.run([sys.executable, *_COMMAND, *where], cwd=work, env=environment, check=True)


def _output(folder: Path, *arguments: str) -> str:
    """Return what a Python prints that imports the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    run = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return run.stdout


def registered_operators(folder: Path) -> dict[str, list[str]]:
    """Return the operators that the libraries in a folder register, with their dispatch keys."""
    keys = sorted({key for _, key in _implementations()})
    operators: dict[str, list[str]] = json.loads(
        _output(folder, "-c", _REGISTERED, json.dumps(keys))
    )
    # Those that Python defines have no kernel of these libraries.
    return {name: keys for name, keys in operators.items() if name in expected_operators()}


def check() -> dict[str, Any]:
    """Build, load and ask; return what was run and found, without a path of this machine.

    Raises:
        CalledProcessError: The build, an import or the diagnosis failed.
        RuntimeError: A library registers other operators than its sources name.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        build(folder)
        operators = registered_operators(folder)
        if operators != expected_operators():
            raise RuntimeError(f"registered are {operators}, not {expected_operators()}")
        lines = _output(folder, "-m", "cm_fused").splitlines()
        # What is left out says which machine this is, and where the folder was.
        left_out = ("cm_fused ", "python ", "imported from ")
        diagnosis = [line for line in lines if not line.startswith(left_out)]
        sizes = {name: (folder / name).stat().st_size for name in _LIBRARIES}
    release = re.search(r"release .*", machine.output("nvcc", "--version"))
    return {
        "date": datetime.date.today().isoformat(),
        "versions": machine.versions(),
        "nvcc": release[0] if release else "unknown",
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", "those of setup.py"),
        "command": [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        + ["python", *_COMMAND],
        "bytes": sizes,
        "operators": operators,
        "diagnosis": diagnosis,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.machine_code.cuda_build", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="default in bench/results")
    arguments = parser.parse_args()
    reason = missing_requirement()
    if reason is not None:
        sys.exit(f"bench.machine_code.cuda_build: {reason}; nothing was built")
    try:
        found = check()
    except (subprocess.CalledProcessError, RuntimeError) as error:
        sys.exit(f"bench.machine_code.cuda_build: {error}")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(found["diagnosis"]))


if __name__ == "__main__":
    main()
