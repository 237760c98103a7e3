"""What pages and docstrings show works as shown, and links lead somewhere."""

import doctest
import importlib.util
import pkgutil
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cm_fused

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "docs", "bench", "bench/paper/results", "tests/data/golden")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
# What only a few examples need: the extra `integration`.
TRAINERS = {
    **{name: name for name in ("accelerate", "hydra", "lightning", "peft", "transformers")},
    "lightning.pytorch.cli": "jsonargparse",
    "torch.utils.tensorboard": "tensorboard",
}
# What tests/optimizer/test_trainers.py runs, in processes of their own.
ELSEWHERE = re.compile(r"^from timm\b|^torch\.distributed\.init_process_group", re.MULTILINE)
_CODE_BLOCK = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _examples() -> Iterator[Any]:
    """Yield the Python blocks of every page."""
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            if ELSEWHERE.search(found[1]):
                continue
            line = text.count("\n", 0, found.start()) + 1
            yield pytest.param(found[1], id=f"{_named(page)}:{line}", marks=list(_marks(found[1])))


def _marks(example: str) -> Iterator[pytest.MarkDecorator]:
    """Yield what an example with a trainer or a log needs: that, and its warnings let pass."""
    for name, package in TRAINERS.items():
        if re.search(rf"^(import|from) {name}\b", example, flags=re.MULTILINE):
            missing = importlib.util.find_spec(package) is None
            yield pytest.mark.skipif(missing, reason=f"{package} is not installed")
            yield pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("example", list(_examples()))
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of a page runs by itself; what it writes goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(example, "example", "exec"), {"__name__": "example"})


def test_the_readme_has_an_example() -> None:
    """And it is among those that run."""
    assert any(str(case.id).startswith("README.md:") for case in _examples())


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


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", _CODE_BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {_slug(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings}


def _slug(heading: str) -> str:
    kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def _links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures, except those on other machines."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _CODE_BLOCK.sub("", page.read_text()))
    return [target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_links_lead_somewhere(page: Path) -> None:
    """The files, pages and headings that a page links to exist."""
    wrong = []
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_named_files_exist(page: Path) -> None:
    """The files that a page names as code exist, under the repository's root or the package."""
    text = _CODE_BLOCK.sub("", page.read_text())
    names = re.findall(r"`((?:bench|cm_fused|csrc|docs|tests|_\w+)/[\w./]+\.\w+)`", text)
    roots = (ROOT, ROOT / "cm_fused")
    missing = [name for name in names if not any((root / name).exists() for root in roots)]
    assert not missing


def test_readme_leads_to_every_page() -> None:
    """A page that the README does not link to is not found."""
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in _links(ROOT / "README.md")}
    assert {*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"} <= linked
