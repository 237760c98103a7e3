"""What README and docstrings show works as shown."""

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import cm_fused

README = Path(__file__).resolve().parents[2] / "README.md"


def test_readme_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of the README runs; what one writes goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_docstring_examples_run() -> None:
    """Every example in a docstring of the package runs, and each public class has one."""
    shown = set()
    for module in pkgutil.walk_packages(cm_fused.__path__, "cm_fused."):
        source = Path(importlib.util.find_spec(module.name).origin or "")  # type: ignore[union-attr]
        if source.suffix != ".py" or ">>> " not in source.read_text():
            continue
        results = doctest.testmod(importlib.import_module(module.name))
        assert results.attempted > 0
        assert results.failed == 0
        shown.add(module.name)
    assert shown >= {"cm_fused.adam_cm", "cm_fused.sam", "cm_fused.diagnostics._recorder"}


def test_readme_names_existing_files() -> None:
    """Every file the README points to exists."""
    text = README.read_text()
    names = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`(tests/\w+\.py)`", text)
    assert names
    missing = [name for name in names if not (README.parent / name).exists()]
    assert not missing
