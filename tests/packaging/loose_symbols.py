"""Checks that torch has what the installed library takes from it, so that libstdc++ may be old.

torch exports functions that its compiler's libstdc++ has and an old one lacks. The linker takes
them from there, without a version, so that auditwheel sees nothing of them. Needs nm.
"""

import subprocess
import sys
from pathlib import Path

import torch

import cm_fused


def symbols(library: Path, kind: str) -> set[str]:
    """Return a library's dynamic symbols, with their versions; the weak undefined are left out."""
    command = ("nm", "--dynamic", f"--{kind}-only", str(library))
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    return {line[-1] for line in lines if line[0] != "w"}


def main() -> None:
    """Exit with the names of what is missing."""
    folder = Path(torch.__file__).parent / "lib"
    exported = set().union(
        *(symbols(folder / f"lib{n}.so", "defined") for n in ("c10", "torch_cpu"))
    )
    taken = symbols(Path(cm_fused.__file__).parent / "_C.abi3.so", "undefined")
    missing = {name for name in taken if "@" not in name} - exported
    if missing:
        sys.exit(f"torch {torch.__version__} does not have {', '.join(sorted(missing))}")
    print(f"torch {torch.__version__} has the functions that the library takes from it")


if __name__ == "__main__":
    main()
