"""How this package was installed: what its build left out and why, and how to build that."""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
# Written by setup.py: why each library that was not built was not.
_RECORD = PACKAGE / "_build.json"
NOT_WANTED = "CM_FUSED_BUILD=none"


def reason_not_built(library: str) -> str | None:
    """Return what the build recorded of a library that it left out; None if there is no record."""
    if not _RECORD.exists():
        return None
    reason: str | None = json.loads(_RECORD.read_text()).get(library)
    return reason


def hidden_installation() -> Path | None:
    """Return the folder of an installed cm_fused that the imported one hides, or None.

    Python started in a clone imports the clone, whatever is installed.
    """
    for distribution in metadata.distributions(name="cm_fused"):
        origin = _origin(distribution)
        installed = Path(str(distribution.locate_file("")))
        if origin.get("dir_info", {}).get("editable"):
            installed = _folder(origin)
        package = installed / "cm_fused"
        if package.joinpath("__init__.py").exists() and not package.samefile(PACKAGE):
            return installed
    return None


def remedy() -> str:
    """Return a sentence that says how to get the C++ extension."""
    hidden = hidden_installation()
    if hidden is not None:
        return (
            f"Python imports cm_fused from {PACKAGE.parent}, which hides the one installed in "
            f"{hidden}: start Python in another folder"
        )
    return f"To build it, have a C++20 compiler and run: {install_command()}"


def install_command() -> str:
    """Return the command that installs this package again with its C++ extension."""
    command = "CM_FUSED_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps"
    return f"{command} {_source()}"


def _source() -> str:
    """Return pip's argument for the place that this package came from."""
    checkout = shlex.quote(str(PACKAGE.parent))
    try:
        distribution = metadata.distribution("cm_fused")
    except metadata.PackageNotFoundError:
        return checkout
    origin = _origin(distribution)
    if "dir_info" in origin:
        editable = "--editable " if origin["dir_info"].get("editable") else ""
        return f"{editable}{shlex.quote(str(_folder(origin)))}"
    if PACKAGE.parent.joinpath("setup.py").exists():
        return checkout
    return f"--no-binary cm_fused cm_fused=={distribution.version}"


def _origin(distribution: metadata.Distribution) -> dict[str, Any]:
    """Return what pip recorded of the place that a distribution came from (PEP 610)."""
    recorded: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
    return recorded


def _folder(origin: dict[str, Any]) -> Path:
    path = origin["url"].removeprefix("file://").encode()
    escaped = re.compile(rb"%([0-9A-Fa-f]{2})")
    return Path(escaped.sub(lambda code: bytes.fromhex(code[1].decode()), path).decode())
