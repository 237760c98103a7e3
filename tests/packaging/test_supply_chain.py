"""What the package takes in and gives out: its imports, the network, the sdist."""

import ast
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import cm_fused

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted((REPOSITORY / "cm_fused").rglob("*.py"))
# All that the package imports besides Python's own; triton and tensorboard only where installed,
# matplotlib only by the command that draws.
DEPENDENCIES = {"torch", "triton", "matplotlib", "cm_fused"}
# What would read a pickle, open a connection or start a program.
REFUSED = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("socket", "ssl", "urllib", "http", "ftplib", "requests", "subprocess", "ctypes"),
}


def _imports(source: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_imports_are_few(source: Path) -> None:
    """The package imports torch, triton and Python's own, and of these none that is refused."""
    imports = _imports(source)
    assert not imports & REFUSED
    assert imports <= DEPENDENCIES | set(sys.stdlib_module_names)


def test_pickles_are_read_by_torch_alone() -> None:
    """No file is loaded but by torch.load with weights_only, its default or said."""
    for source in SOURCES:
        text = source.read_text()
        assert "weights_only=False" not in text, source
        assert not re.search(r"\bUnpickler\b|(?<!json)\.loads\(", text), source


def test_no_network_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing, stepping and saving open no connection."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    param = torch.zeros(3, requires_grad=True)
    optimizer = cm_fused.AdamCM([param])
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_sdist_holds_what_a_build_needs_and_no_more(tmp_path: Path) -> None:
    """The sdist has the package, its C++ sources, metadata and license: no tests, no results."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(
        [*command[:3], "egg_info", "--egg-base", str(tmp_path), *command[3:]],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    files = {name for name in names if "." in Path(name).name or name in ("LICENSE",)}
    top = {"setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    others = {
        name
        for name in files - top - {"PKG-INFO"}
        if not re.fullmatch(r"cm_fused/.*\.(py|typed)|csrc/.*\.(h|cpp|cu)", name)
        and ".egg-info" not in name
    }
    assert not others
    needed = {f"csrc/{path.relative_to(REPOSITORY / 'csrc')}" for path in _cpp_sources()}
    assert needed <= files


def _cpp_sources() -> list[Path]:
    return [
        path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu")
    ]


@pytest.mark.skipif(
    not (REPOSITORY / ".git").exists() or shutil.which("git") is None, reason="not a checkout"
)
def test_the_checkout_has_the_known_top_level() -> None:
    """A copy of the whole tree was committed once, and no test looked beyond its own folder."""
    # Whoever owns the checkout.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    folders = {name.partition("/")[0] for name in listed.stdout.split("\0") if "/" in name}
    assert folders == {".ci", "bench", "cm_fused", "csrc", "docs", "tests"}
