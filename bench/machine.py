"""What the measurements were taken on and with. Never a path, a host's name or a user's."""

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from cm_fused.ops import cpu, library

_REPOSITORY = Path(__file__).parent.parent
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def default_device() -> str:
    """Return the type of device to measure: "cuda" where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_bytes(device_type: str) -> int:
    """Return the memory of the machine or of its GPU."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties().total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def device(device_type: str) -> dict[str, str | int | float]:
    """Describe the processor or the GPU."""
    return _gpu() if device_type == "cuda" else _cpu()


def _gpu() -> dict[str, str | int | float]:
    properties = torch.cuda.get_device_properties()
    return {
        "type": "cuda",
        "model": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": str(torch.version.cuda),
        "memory_gib": round(memory_bytes("cuda") / 2**30, 1),
        "priority_kernel": library.cuda_unavailable_reason or "CUDA",
    }


def _cpu() -> dict[str, str | int | float]:
    return {
        "type": "cpu",
        "model": _cpu_model(),
        "instructions": cpu.capability() if cpu.unavailable_reason is None else "none",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cache": _last_cache(),
        "memory_gib": round(memory_bytes("cpu") / 2**30, 1),
    }


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
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "cm_fused", "csrc", "bench")
        return git("rev-parse", "--short=12", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
