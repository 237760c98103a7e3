"""The machine and versions of measurements. Never a path, a host's name or a user's."""

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench import internals
from cm_fused import AdamCM

DEVICES = ("cpu", "cuda")
Description = dict[str, str | int | float]
_REPOSITORY = Path(__file__).parent.parent
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def default_device() -> str:
    """Return the device that is measured unless another is asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_bytes(device: str) -> int:
    """Return the memory of a device."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(device: str) -> int:
    """Return the size of a GPU's L2; 0 for a CPU, whose caches no measurement here looks at."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def synchronize(device: str) -> None:
    """Wait until a device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@cache
def describe(device: str) -> Description:
    """Describe what is measured: the processor, or the GPU and its host's processor."""
    return _describe_cuda() if device == "cuda" else _describe_cpu()


def _describe_cpu() -> Description:
    return {
        "type": "cpu",
        "model": _cpu_model(),
        "instructions": internals.instruction_set(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache": _last_cache(),
        "memory_gib": round(memory_bytes("cpu") / 2**30, 1),
    }


def _describe_cuda() -> Description:
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda",
        "model": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cache": f"L2 {cache_bytes('cuda') / 2**20:.0f} MiB",
        "memory_gib": round(memory_bytes("cuda") / 2**30, 1),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "backend": _backend(),
        "host": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _backend() -> str:
    """Return what steps CUDA parameters by default, as an optimizer's `repr` says it."""
    optimizer = AdamCM([torch.zeros(1, device="cuda", requires_grad=True)])
    found = re.search(r"Active backends: (.+)", repr(optimizer))
    return found[1] if found else "unknown"


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _last_cache() -> str:
    levels = sorted(_CACHES.glob("index*"))
    if not levels:
        return "unknown"
    level, size = ((levels[-1] / name).read_text().strip() for name in ("level", "size"))
    return f"L{level} {size}"


@cache
def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    pyproject = (_REPOSITORY / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    return {
        "cm_fused": found[1] if found else "unknown",
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    # For a copy of the tree without its history.
    if "CM_FUSED_COMMIT" in os.environ:
        return os.environ["CM_FUSED_COMMIT"]
    head = output("git", "-C", str(_REPOSITORY), "rev-parse", "--short=12", "HEAD")
    if head == "unknown":
        return head
    # Not what benches write: the second of two runs is of the same code.
    written = (":!bench/results", ":!bench/paper/results", ":!bench/RELIABILITY.md")
    parts = ("cm_fused", "csrc", "bench", *written)
    status = ("status", "--porcelain", "--untracked-files=no", *parts)
    changed = output("git", "-C", str(_REPOSITORY), *status)
    return head + (" and changes" if changed else "")


def output(*command: str) -> str:
    """Return what a command prints, or "unknown"."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return finished.stdout.strip()
