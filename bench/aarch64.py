"""The aarch64 wheel run on another machine: `make package-aarch64`, then `python -m bench.aarch64`.

Runs the package and tests under qemu's user emulation, with torch's own aarch64 wheel, and writes
what was run and what passed to a file. Everything for aarch64 is unpacked into build/aarch64: a
Debian with Python, torch, pytest. Nothing is installed on this machine, which needs Debian's apt,
g++-aarch64-linux-gnu and qemu-user-static.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import machine

_REPOSITORY = Path(__file__).parents[1]
_FOLDER = _REPOSITORY / "build" / "aarch64"
_RESULTS = _REPOSITORY / "bench" / "results" / "aarch64.json"
_QEMU = "qemu-aarch64-static"
_TOOLS = (_QEMU, "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-nm", "apt-get", "dpkg-deb")
# A processor with NEON and without SVE: the baseline that the wheel is compiled for.
_CPU = "neoverse-n1"
_DEBIAN = ("python3", "libstdc++6", "libgomp1")
_TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions")
_TESTS_NEED = ("expecttest", "hypothesis", "numpy", "pytest")
# What the tests read besides the installed package.
_TREE = ("tests", "bench", "csrc", "docs", "pyproject.toml", "setup.py", "README.md")
# They start no process of their own, which would need the emulator again. Those of the eager
# backend test torch, and Triton is not installed.
_SELECTED = "not eager and not triton"
_TESTS = (
    "tests/backends/test_frozen_bits.py",
    "tests/backends/test_parity.py",
    "tests/optimizer/test_golden.py",
)


def missing_requirement() -> str | None:
    """Return why nothing can be run here, or None."""
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if len(_wheels()) != 1:
        return f"{len(_wheels())} wheels in dist/aarch64; make package-aarch64 leaves one"
    return None


def _wheels() -> list[Path]:
    return list((_REPOSITORY / "dist" / "aarch64").glob("*_aarch64.whl"))


def _run(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def unpack_debian(root: Path) -> None:
    """Put arm64's Python and what it needs into a folder, by an apt with a state of its own."""
    state = root.parent / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
    }
    apt = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in options.items())]
    _run(*apt, "update")
    _run(*apt, "install", "--yes", "--download-only", *_DEBIAN)
    root.mkdir()
    for package in (state / "archives").glob("*.deb"):
        _run("dpkg-deb", "--extract", package, root)
    if not (root / "lib").exists():  # later Debians have all in /usr
        (root / "lib").symlink_to("usr/lib")


def write_cpuinfo(root: Path) -> None:
    """Describe the emulated processor as its kernel would, in `root`, where qemu looks first.

    qemu passes on this machine's /proc/cpuinfo: torch's cpuinfo finds no processor of ARM in it
    and reads through a null pointer.
    """
    text = "".join(
        f"processor\t: {i}\n"
        "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid "
        "asimdrdm lrcpc dcpop asimddp\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0c\n"
        "CPU revision\t: 1\n\n"
        for i in range(os.cpu_count() or 1)
    )
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(text)


def install_packages(site: Path, python: str, torch: str) -> None:
    """Install torch and what the tests need for a Python of aarch64 into a folder."""
    pip: tuple[str | Path, ...] = (
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--only-binary=:all:", "--python-version", python, "--target", site, "--upgrade"),
        *("--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64"),
        *("--constraint", _REPOSITORY / ".ci" / "constraints.txt"),
    )
    _run(*pip, *_TORCH_NEEDS, *_TESTS_NEED)
    # Without CUDA's libraries, gigabytes.
    _run(*pip, "--no-deps", torch)


def stand_in_source(symbols: dict[str, str]) -> tuple[str, str]:
    """Return C and a version script that define functions, given their versions ("" for none).

    Each returns an error, so that torch finds no device.
    """
    special = {
        "cudaGetDeviceCount": "int {}(int* n) {{ *n = 0; return 100; }}",
        "cudaGetErrorName": 'const char* {}(int e) {{ return "no CUDA"; }}',
        "cudaGetErrorString": 'const char* {}(int e) {{ return "no CUDA"; }}',
        "cudaGetLastError": "int {}(void) {{ return 0; }}",
        "cudaPeekAtLastError": "int {}(void) {{ return 0; }}",
        "__cudaRegisterFatBinary": "void* {}(void* p) {{ static void* handle; return &handle; }}",
    }
    functions = [special.get(n, "long {}(void) {{ return 100; }}").format(n) for n in symbols]
    nodes = [
        f"{version} {{ {' '.join(f'{n};' for n, v in symbols.items() if v == version)} }};"
        for version in sorted(set(symbols.values()) - {""})
    ]
    return "\n".join(functions) + "\n", "\n".join(nodes) + "\n"


def _dynamic_symbols(libraries: list[Path], *options: str) -> Iterator[tuple[str, str]]:
    """Yield the names and versions of symbols of libraries."""
    command = ("aarch64-linux-gnu-nm", "--dynamic", "--just-symbols", *options)
    for line in _run(*command, *libraries).splitlines():
        name, _, version = line.strip().partition("@")
        yield name, version.lstrip("@")


def stand_in_for_cuda(folder: Path, site: Path) -> None:
    """Make one library under the names of all of CUDA's that torch's libraries ask for."""
    libraries = [p for p in (site / "torch" / "lib").iterdir() if ".so" in p.suffixes]
    defined = {name for name, _ in _dynamic_symbols(libraries, "--defined-only")}
    symbols = {
        name: version
        for name, version in _dynamic_symbols(libraries, "--undefined-only")
        if re.match(r"(__)?(cu|nccl|nv)", name) and name not in defined
    }
    folder.mkdir()
    source, script = stand_in_source(symbols)
    (folder / "cuda.c").write_text(source)
    (folder / "cuda.map").write_text(script)
    versions = f"-Wl,--version-script={folder / 'cuda.map'}"
    command = ("aarch64-linux-gnu-gcc", "-w", "-shared", "-fPIC", "-fno-builtin", versions)
    _run(*command, folder / "cuda.c", "-o", folder / "cuda.so")
    read = _run("aarch64-linux-gnu-readelf", "--dynamic", *libraries)
    for name in set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nccl|nv)[^\]]*)\]", read)):
        if not (site / "torch" / "lib" / name).exists():
            (folder / name).symlink_to("cuda.so")


def prepare(torch: str) -> None:
    """Unpack what runs; what a former run with that torch unpacked stays, except tree and wheel."""
    root, site, prepared = (_FOLDER / name for name in ("root", "site", "prepared"))
    if not prepared.exists() or prepared.read_text() != torch:
        for folder in (root, site, _FOLDER / "cuda"):
            shutil.rmtree(folder, ignore_errors=True)
        unpack_debian(root)
        write_cpuinfo(root)
        install_packages(site, _python(root).name.removeprefix("python"), torch)
        stand_in_for_cuda(_FOLDER / "cuda", site)
        prepared.write_text(torch)
    tree, installed = _FOLDER / "tree", _FOLDER / "installed"
    for folder in (tree, installed):
        shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in _TREE:
        path = _REPOSITORY / name
        (tree / name).parent.mkdir(exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=ignored)
        else:
            shutil.copy(path, tree / name)
    with zipfile.ZipFile(_wheels()[0]) as archive:
        archive.extractall(installed)


def _python(root: Path) -> Path:
    (found,) = (root / "usr" / "bin").glob("python3.[0-9]*[0-9]")
    return found


def emulated(*arguments: str, check: bool = True) -> str:
    """Return what aarch64's Python prints that imports the wheel."""
    search = f"{_FOLDER / 'installed'}:{_FOLDER / 'site'}"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = (
        *(_QEMU, "-cpu", _CPU, "-L", str(_FOLDER / "root")),
        *("-E", f"LD_LIBRARY_PATH={_FOLDER / 'cuda'}", str(_python(_FOLDER / "root"))),
        *arguments,
    )
    finished = subprocess.run(
        command, cwd=_FOLDER / "tree", env=environment, stdout=subprocess.PIPE, text=True
    )
    if check:
        finished.check_returncode()
    return finished.stdout


def run_tests(path: str) -> dict[str, int]:
    """Run a file of tests; return how many passed, failed and were skipped."""
    report = _FOLDER / "junit.xml"
    report.unlink(missing_ok=True)
    options = ("-q", "-p", "no:cacheprovider", "-k", _SELECTED, f"--junitxml={report}")
    print(emulated("-m", "pytest", *options, path, check=False), flush=True)
    suite = xml.etree.ElementTree.parse(report).getroot()[0]
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return {"passed": passed, "failed": failed, "skipped": counts["skipped"]}


def check() -> dict[str, Any]:
    """Run the diagnosis, training and the tests; return what was run and found."""
    lines = emulated("-m", "cm_fused").splitlines()
    print("\n".join(lines), flush=True)
    trained = emulated("-W", "error", "tests/packaging/train_installed.py")
    tests = {path: run_tests(path) for path in _TESTS}
    versions = machine.versions()
    return {
        "date": datetime.date.today().isoformat(),
        "wheel": _wheels()[0].name,
        "commit": versions["commit"],
        "torch": emulated("-c", "import torch; print(torch.__version__)").strip(),
        "python": emulated("-V").split()[1],
        "glibc": emulated("-c", "import platform; print(platform.libc_ver()[1])").strip(),
        "qemu": _run(_QEMU, "--version").splitlines()[0].removeprefix("qemu-aarch64 version "),
        "emulated processor": _CPU,
        "compiler": _run("aarch64-linux-gnu-g++", "--version").splitlines()[0],
        # What is left out says which machine this is, and where the folder was.
        "diagnosis": [n for n in lines if not n.startswith(("python ", "imported from "))],
        "train_installed.py": trained.split(" on ")[0],
        "selected": _SELECTED,
        "tests": tests,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.aarch64", description=__doc__)
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs for aarch64")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="default in bench/results")
    arguments = parser.parse_args()
    reason = missing_requirement()
    if reason is not None:
        sys.exit(f"bench.aarch64: {reason}; nothing was run")
    prepare(arguments.torch)
    found = check()
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    failed = sum(counts["failed"] for counts in found["tests"].values())
    sys.exit(f"{failed} tests failed" if failed else None)


if __name__ == "__main__":
    main()
